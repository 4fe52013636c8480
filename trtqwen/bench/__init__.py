"""Load tests: workloads, a load generator, figures with confidence intervals, reports, and comparisons of servers."""
