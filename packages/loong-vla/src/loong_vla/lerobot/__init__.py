"""LeRobot datasets, v2.1 and v3.0: layout, episodes, video, statistics, and a generator of small valid ones."""
