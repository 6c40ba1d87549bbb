"""What a job needs on a cluster: memory, communication, time of a step; see `labelmill plan`."""
