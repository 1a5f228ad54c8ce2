"""IR and analysis: programs, dims, couplings, costs, and running a program as a stream."""
