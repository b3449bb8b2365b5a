def write_frontier(result, output):
    pass
