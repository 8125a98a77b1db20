"""One experiment at every point of a grid, each point an ordinary run directory, each run a job of submitit.

grid         what is varied, and the name of every point
directory    the sweep's directory: its points, their configurations, how far each of them is
jobs         a point as a job, and what is asked of jobs wherever they run
local_jobs   on this machine                              slurm_jobs   on a cluster
"""
