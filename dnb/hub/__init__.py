"""The service beside the controller that owns parameters, optimizer state and sample order."""
