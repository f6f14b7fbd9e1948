"""The account of a merge: which snapshots, groups and layers it gains by, and how the loss lies around it."""
