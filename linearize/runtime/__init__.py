"""Running a compiled model: state, generation, saving and loading."""
