"""One run in the hub: carries out the decisions of `hub.scheduling` with the parts below."""
