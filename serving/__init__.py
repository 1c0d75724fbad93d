"""Online embedding and search: gateways that speak HTTP, encoder and search replicas, versions that follow an alias."""
