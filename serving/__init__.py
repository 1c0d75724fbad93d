"""Online embedding and search (Ray Serve); its issue is not built yet."""
