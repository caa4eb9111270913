"""How the built-in `demo` checkpoint was made: drawn pictures, questions about them, training, export, measurement."""
