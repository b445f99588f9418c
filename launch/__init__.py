"""What runs *around* the ranks: the `harness` command, launchers, batch scripts. No torch, MPI, numpy or h5py here."""
