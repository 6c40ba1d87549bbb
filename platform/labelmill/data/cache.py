class ShardCache:
    def __init__(self, folder: str, limit: int) -> None:
        raise NotImplementedError
