"""Moving data and processes: Ray Data, Ray Train, tracking and the command line."""
