def speeds(source): return {}
def planning_seconds(): return {}
