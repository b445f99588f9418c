"""Train PyTorch models with Horovod over MPI, and stop and restart them anywhere.

This package is what runs *inside a rank*. What runs around the ranks (the `harness` command, launchers, batch
scripts) is in the package `launch`; `harness` never imports it.
"""
