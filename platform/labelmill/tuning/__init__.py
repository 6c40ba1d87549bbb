"""Search over settings of a job with Ray Tune: `labelmill tune`."""
