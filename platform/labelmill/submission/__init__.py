"""Jobs on a cluster: what is shipped, how it is submitted, how it is followed."""
