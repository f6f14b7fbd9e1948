"""A follower: searches what a live run leaves on the disk, while training goes on."""
