"""Real file systems on disks that can fail: ``disk`` is the rig, ``fuse_disk`` the server below it."""
