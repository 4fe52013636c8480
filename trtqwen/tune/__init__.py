"""Search for the batching parameters that serve a workload best: successive halving on an engine or the simulator."""
