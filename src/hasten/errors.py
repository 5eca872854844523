"""Every error that hasten raises on purpose.

    HastenError                   exit 1
    ├── UsageError                exit 2   an option, scheme or value that does not exist
    ├── ModelError                         the model cannot be used
    │   ├── ModelNotFoundError             no such folder, or a hub id without a network
    │   ├── UnsupportedModelError          an architecture or feature nothing here runs
    │   ├── WeightsError                   missing, truncated or contradictory weights
    │   └── TokenizerError                 no tokenizer, or one that cannot be read
    ├── RequestError                       one request cannot be served; the others go on
    ├── ResourceError                      too little disk or memory, said with figures
    ├── OutOfBlocksError                   no free KV cache block; the scheduler preempts
    ├── RuntimeFailedError                 a runtime's process ended or answered nonsense
    ├── EngineUnavailableError             no engine process to serve a request just now
    ├── DrainingError                      the server ends and takes no new requests
    ├── QueueFullError                     as many requests wait as may; has the seconds to stay away
    ├── RequestTimeoutError                a request took longer than it may
    ├── EndpointError                      a server to measure cannot be reached, or answers nonsense
    ├── ResultError                        a result file that is not one of ours
    ├── MissingExtraError         exit 3   an optional package is not installed
    └── GateError                 exit 4   a quality or speed gate was not met

A message is one sentence: what is wrong, what was found, what is allowed, how to mend it.
The command line prints it without a traceback and exits with `exit_code`.
"""


class HastenError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class UsageError(HastenError):
    exit_code = 2


class ModelError(HastenError):
    pass


class ModelNotFoundError(ModelError):
    pass


class UnsupportedModelError(ModelError):
    pass


class WeightsError(ModelError):
    pass


class TokenizerError(ModelError):
    pass


class RequestError(HastenError):
    pass


class ResourceError(HastenError):
    pass


class OutOfBlocksError(HastenError):
    pass


class RuntimeFailedError(HastenError):
    pass


class EngineUnavailableError(HastenError):
    pass


class DrainingError(HastenError):
    pass


class QueueFullError(HastenError):
    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(HastenError):
    pass


class EndpointError(HastenError):
    pass


class ResultError(HastenError):
    pass


class MissingExtraError(HastenError):
    exit_code = 3


class GateError(HastenError):
    exit_code = 4
