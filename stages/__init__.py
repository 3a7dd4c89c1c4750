"""What runs at a vertex of the graph: one package for each kind of stage, and the policies they share."""
