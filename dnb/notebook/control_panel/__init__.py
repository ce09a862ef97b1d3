"""The control panel: pool, training and run by mouse or keyboard."""
