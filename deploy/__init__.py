"""Ways to run the service on more than one machine, or watched: compose, Kubernetes, Ray Serve."""
