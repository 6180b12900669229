"""Ray: the session, the placement of work, worker groups, Tune. Nothing else places work."""
