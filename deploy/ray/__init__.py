"""The service on Ray Serve: service.py is what is deployed, README.md says how."""
