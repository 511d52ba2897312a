"""MXNet's symbols and parameter files, run as branchgraph graphs."""
