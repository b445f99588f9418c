"""Forms of training beyond one averaged gradient: who works with whom, and what each form moves between ranks.

buckets.py        which gradients travel together
reducer.py        gradients summed over ranks while others are still computed
adasum.py         steps combined instead of gradients
sharded.py        an optimizer whose state is cut over ranks
groups.py         which ranks form a replica of the model, and which hold the same part of it in all replicas
local.py          ranks take steps of their own, then their parameters are averaged
traffic.py        what crosses the network
combinations.py   what does not go together
"""
