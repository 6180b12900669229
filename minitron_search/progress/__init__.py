"""Show how far a run is: what its logs say of it, as a state, and that state on a terminal or in lines."""
