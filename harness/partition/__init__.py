"""Data partitions: which part of a data set each sample belongs to, so that each rank trains on a part of its own.

    harness data partition "train-*.h5" -o parts.h5 --parts 8 --by groups --of user
    harness run CONFIG data.partition=parts.h5 -n 8

`methods` and `clusters` decide, `file` keeps the decision (one small file; no sample is copied), `balance` tells how
even it is, `split` copies the samples of each part into a file of its own, `order` is the order in which ranks read.
"""
