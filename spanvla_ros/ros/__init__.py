"""Nodes, publishers and the live drive; the only place where ROS packages are imported."""
