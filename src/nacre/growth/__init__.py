"""Growth: the plan as data, one verb per step, the trunk, and what it all costs."""
