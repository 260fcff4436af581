"""Routes of the API, one file a subject. They read requests and write answers; rules are in the service."""
