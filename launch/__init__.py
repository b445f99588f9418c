"""What runs *around* the ranks: the `harness` command, launchers, batch scripts. Imports no torch, MPI, numpy or h5py."""
