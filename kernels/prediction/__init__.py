"""Storing the residuals of full steps, and predicting cached steps from them."""
