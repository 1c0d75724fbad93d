"""Environment variables and Ray Serve settings that the processes of the service share."""

CLUSTER = {
    "RAY_worker_niceness": "0",  # or replicas starve beside any other process
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
"""Read by Ray itself: set before it is started."""
COMPUTE = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads of a forward pass must not spin on cores that others need
    "TOKENIZERS_PARALLELISM": "false",
    # memory of a pass is kept for the next one, which otherwise faults it in again (up to a third of a pass)
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
}
"""For every process that decodes or computes."""
ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""For replicas that handle requests: a batch changes threads nowhere on its way to the encoder."""
REPLICA = COMPUTE | ONE_LOOP
"""Given to the gateways, encoders and searchers with their deployment, whoever started Ray."""
LOGGING = {"encoding": "TEXT", "log_level": "WARNING", "enable_access_log": False}
HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 15, "graceful_shutdown_wait_loop_s": 0.2}
"""Options of every deployment."""
