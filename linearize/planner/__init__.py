"""What each attention becomes under a budget: costs, scores, a solver, and the curve of loss over bytes."""
