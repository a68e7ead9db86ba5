# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutExpertRequest(_message.Message):
    __slots__ = ("name", "adapter", "generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    adapter: str
    generation: int
    def __init__(self, name: _Optional[str] = ..., adapter: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class RemoveExpertRequest(_message.Message):
    __slots__ = ("name", "generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class BankChange(_message.Message):
    __slots__ = ("generation", "experts")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    experts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., experts: _Optional[_Iterable[str]] = ...) -> None: ...

class ExpertDescription(_message.Message):
    __slots__ = ("name", "digest", "rank", "alpha", "rslora", "targets", "gate", "groups", "resident_bytes", "requests", "routed", "router")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    rank: int
    alpha: float
    rslora: bool
    targets: _containers.RepeatedScalarFieldContainer[str]
    gate: str
    groups: _containers.RepeatedScalarFieldContainer[int]
    resident_bytes: int
    requests: int
    routed: int
    router: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., rslora: _Optional[bool] = ..., targets: _Optional[_Iterable[str]] = ..., gate: _Optional[str] = ..., groups: _Optional[_Iterable[int]] = ..., resident_bytes: _Optional[int] = ..., requests: _Optional[int] = ..., routed: _Optional[int] = ..., router: _Optional[str] = ...) -> None: ...

class DescribeExpertsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeExpertsResponse(_message.Message):
    __slots__ = ("generation", "experts", "replicas")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertDescription]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaDescription]
    def __init__(self, generation: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertDescription, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaDescription, _Mapping]]] = ...) -> None: ...

class ReplicaDescription(_message.Message):
    __slots__ = ("replica", "generation", "state")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    replica: str
    generation: int
    state: str
    def __init__(self, replica: _Optional[str] = ..., generation: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("moved",)
    MOVED_FIELD_NUMBER: _ClassVar[int]
    moved: int
    def __init__(self, moved: _Optional[int] = ...) -> None: ...
