"""What a GPU computes in few launches: Triton, and the plain way where there is none."""
