"""JSON files -> typed, checked objects."""
from pydantic import BaseModel, ConfigDict, Field, model_validator


class MemoryConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    num_memory: int = Field(gt=0)
    chunk_size: int = Field(gt=0)
    lora_rank: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(ge=0, lt=1, default=0.0)

    @model_validator(mode="after")
    def _divides(self):
        if self.chunk_size % self.num_memory:
            raise ValueError("chunk_size % num_memory")
        return self

    def capacity(self, ctx: int) -> int:
        return self.chunk_size * (1 + (ctx - self.chunk_size) // self.num_memory)
