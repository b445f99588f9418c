"""Forms of training beyond one averaged gradient: who works with whom, and what each form moves between ranks.

settings.py       the section `parallel` of a config; combinations.py: what does not go together
groups.py         which ranks form a replica of the model, and which hold the same part of it in all replicas
buckets.py        which gradients travel together
reducer.py        gradients summed over ranks while others are still computed
adasum.py         steps combined instead of gradients
sharded.py        an optimizer whose state is cut over ranks
local.py          ranks take steps of their own, then their parameters are averaged
server.py         some ranks hold the parameters, the others push gradients and pull
vector.py         parameters as vectors, cut into the servers' slices
rescue.py         what servers save when a worker is lost
tensor.py         layers cut over the ranks of a replica; collectives.py: what they send, with its gradient
pipeline.py       layers on different ranks, a run of them each; wire.py: tensors from rank to rank
spread.py         a task's model as the ranks of a replica share it
norm.py           the norm of a gradient that lies on several ranks
traffic.py        what crosses the network
"""
