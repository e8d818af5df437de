"""What a client loads once: the Video-LLM, and the encoders of caption vectors, each when it is first needed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memdb.schemas.errors import ModelMismatch
from memdb.store import Store

if TYPE_CHECKING:
    from memdb.models.caption_vectors import CaptionVectors
    from memdb.models.protocol import VideoModel
    from memdb.models.sheet import ModelSheet

log = logging.getLogger(__name__)

DEFAULT_MODEL = "embedded"


class Loaded:
    """Whoever shares it holds a lock of their own while they load or use."""

    def __init__(
        self, store: Store, spec: str | None = None, device: str | None = None, dtype: str | None = None
    ) -> None:
        """spec: the model as `connect` takes it; by default the one that the store remembers."""
        self._store, self._spec, self._device, self._dtype = store, spec, device, dtype
        self._model: VideoModel | None = None
        self._encoders: dict[str, CaptionVectors] = {}

    def sheet(self) -> ModelSheet | None:
        """What the model's folder says of it, if that can be known without loading it."""
        from memdb.models.load import sheet_of

        return self._model.sheet if self._model is not None else sheet_of(self._named())

    def model(self) -> VideoModel:
        """Raises ModelError, and ModelMismatch where the store remembers another under that name."""
        from memdb.models.load import load_model

        if self._model is None:
            known = self._store.model
            model = load_model(self._named(), device=self._device, dtype=self._dtype)
            found = model.identity.fingerprint
            if self._spec is None and known is not None and known.fingerprint != found:
                raise ModelMismatch(
                    f"the store remembers the model {known.spec!r}, but what loads under that name now is another "
                    f"({known.fingerprint[:12]}, now {found[:12]}): name the right one with --model, or ingest into "
                    "a new store"
                )
            self._model = model
        return self._model

    def vectors(self, encoder: str) -> CaptionVectors:
        """The encoder of caption vectors by the name that a recipe or a recording has (with or without @digest)."""
        from memdb.models.caption_vectors import caption_vectors

        if encoder not in self._encoders:
            vectors = caption_vectors(encoder.split("@")[0], self.model)
            if "@" in encoder and vectors.name != encoder:
                raise ModelMismatch(
                    f"captions here were embedded by {encoder}, and what is loaded is {vectors.name}: use that model"
                )
            self._encoders[encoder] = vectors
        return self._encoders[encoder]

    def question_vectors(self, encoder: str) -> CaptionVectors | None:
        """For questions: None where what is loaded is not the encoder that made the vectors."""
        try:
            return self.vectors(encoder)
        except ModelMismatch as error:
            log.info("%s; ranking by words", error)
            return None

    def search_vectors(self, encoder: str) -> CaptionVectors | None:
        """For search: encoders that need a Video-LLM take part only if it is loaded already."""
        from memdb.models.caption_vectors import INPUT_EMBEDDINGS

        if encoder.startswith(INPUT_EMBEDDINGS) and self._model is None:
            return None
        return self.question_vectors(encoder)

    def _named(self) -> str:
        """The Video-LLM's name: as given, else as the store remembers it."""
        from memdb.models.load import normal_spec

        if self._spec is not None:
            return normal_spec(self._spec)
        known = self._store.model
        return normal_spec(known.spec if known is not None else DEFAULT_MODEL)
