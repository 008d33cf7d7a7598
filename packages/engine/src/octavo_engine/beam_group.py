"""BeamGroup: the beams of one request, as sequences that share blocks and take each step together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from octavo_engine.batch import RowMove
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.beam_search import BeamSearch, Candidates, Place
from octavo_engine.residents import Residents
from octavo_engine.sequence import Sequence, SequenceStatus, num_common
from octavo_engine.types import FinishReason, SequenceUpdate


@dataclass(slots=True, eq=False)
class BeamGroup:
    """A search and its beams. Only the scheduler writes it.

    Every member has the same number of tokens. None computes its last one but together with all others, so that the
    answers of one step are the candidates of all beams. The first member is the leader: it stands for the group in
    the queue, and has rows set aside for as many members as there may be.

    Attributes:
        residents: what the parts of the scheduler share.
        search: which beams go on.
        members: the sequences, by place in the search. After preemption only those that have a row run.
        moves: what the runner's rows take over with the next step.
        unknown: members with a row that the runner has not seen yet.
    """

    residents: Residents
    search: BeamSearch
    members: list[Sequence]
    moves: list[RowMove] = field(default_factory=list)
    unknown: set[Sequence] = field(default_factory=set)

    @classmethod
    def begin(cls, residents: Residents, beams: BeamSearchParams, sequence: Sequence) -> BeamGroup:
        """Return the group of a search that begins with one beam, the prompt."""
        search = BeamSearch(
            beams.beam_width,
            max_num_tokens=sequence.max_num_tokens - sequence.num_prompt_tokens,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            stop_token_ids=sequence.stop_token_ids,
            stops=sequence.request.stops,
            min_tokens=beams.min_tokens,
            num_top_logprobs=beams.logprobs,
        )
        return cls(residents, search, [sequence])

    @property
    def leader(self) -> Sequence:
        """The member that the queue knows."""
        return self.members[0]

    @property
    def awaits_answer(self) -> bool:
        """True while a step of the beams is in flight: which tokens they have next is not known."""
        return self.leader.num_placeholders > 0

    def enter(self, member: Sequence) -> None:
        """Let a member that waits run, with the blocks of the running one that it has most tokens in common with.

        The tokens in common must have been computed, by steps in flight at the latest.
        """
        running = [m for m in self.members if m.row is not None]
        lengths = [num_common(m.token_ids, member.token_ids) for m in running]
        source = running[lengths.index(max(lengths))]
        self._take_reserved_row()
        self.residents.join(member, source, min(max(lengths), len(member.token_ids) - 1))
        self.unknown.add(member)

    def advance(self, candidates: Mapping[Sequence, Candidates]) -> list[SequenceUpdate]:
        """Take in the answer to a step: beams fork, go on or end; the hypotheses once the search has ended."""
        leader = self.leader
        if leader.first_token_time is None:
            leader.first_token_time = self.residents.clock()
        places = self.search.advance([candidates[member] for member in self.members])
        if self.search.finished:
            return self._end_with_hypotheses()
        self._take_places(places)
        return []

    def preempt(self) -> None:
        """Take all rows and blocks; the leader waits for all members, whose blocks are on the host, or gone."""
        if all(member.row is not None for member in self.members) and self.residents.swapper.try_out(self.members):
            self.residents.counters.num_swaps += 1
            self._give_up(self.residents.move_out)
        else:
            self.recompute()

    def recompute(self) -> None:
        """Take all rows and blocks; the leader waits for all members, which are computed again."""
        self._give_up(self.residents.withdraw)

    def _give_up(self, take_row: Callable[[Sequence], None]) -> None:
        leader = self.leader
        num_rows = sum(member.row is not None for member in self.members) + leader.num_forks_wanted
        for member in self.members:
            if member.row is not None:
                take_row(member)
        self.moves.clear()
        self.unknown.clear()
        self.residents.wait(leader)
        leader.num_forks_wanted = num_rows - 1

    def resume(self) -> None:
        """Give all members rows again, whose blocks came back from the host together."""
        self.residents.resume(self.leader)
        for member in self.members[1:]:
            self._take_reserved_row()
            self.residents.resume(member)
        self.unknown.update(self.members)

    def end(self, reason: FinishReason, error: str | None = None) -> SequenceUpdate:
        """End the search without an answer."""
        leader, request = self.leader, self.leader.request
        self.residents.counters.finished[reason.value] += request.sampling.n
        for member in self.members:
            member.finish_reason = reason
        self.residents.timelines.ended(leader, 0, reason, 0)
        self._leave()
        return SequenceUpdate(
            request.request_id, 0, finish_reason=reason, error=error, times=self.residents.times(leader)
        )

    def _take_places(self, places: list[Place | None]) -> None:
        """Fork and prune: each place of the search becomes a member with one token more."""
        before, position = self.members, len(self.leader.token_ids)
        self.members = [
            self._member_at(index, before[place.source], before)
            for index, place in enumerate(places)
            if place is not None
        ]
        self._drop([member for member in before if member not in self.members])
        kept = [place for place in places if place is not None]
        for member, place in zip(self.members, kept, strict=True):
            source = before[place.source]
            assert member.row is not None
            moved_from = None if source is member else source.row
            self.moves.append(RowMove(member.row, moved_from, position, place.token_id))
            member.token_ids.append(place.token_id)

    def _member_at(self, index: int, source: Sequence, before: list[Sequence]) -> Sequence:
        """Return the member of a place, with the tokens and blocks of the beam that it continues."""
        if index < len(before):
            if before[index] is not source:
                self.residents.become(before[index], source)
            return before[index]
        self._take_reserved_row()
        member = self.residents.add_fork(source, index)
        member.beams = self
        return member

    def _drop(self, members: list[Sequence]) -> None:
        """Let members leave for good; their rows stay set aside for the group."""
        for member in members:
            num_rows = member.num_rows
            self.residents.leave(member)
            member.status = SequenceStatus.FINISHED
            self.residents.forget(member)
            self.residents.rows.reserve(num_rows)
            self.leader.num_forks_wanted += num_rows

    def _end_with_hypotheses(self) -> list[SequenceUpdate]:
        leader, request, counters = self.leader, self.leader.request, self.residents.counters
        hypotheses = self.search.hypotheses[: request.sampling.n]
        if not hypotheses:
            return [self.end(FinishReason.ERROR, "the grammar, the bans and the processors together leave no text")]
        for index, hypothesis in enumerate(hypotheses):
            reason = FinishReason.STOP if hypothesis.stopped else FinishReason.LENGTH
            self.residents.timelines.ended(leader, index, reason, len(hypothesis.token_ids))
        self._leave()
        times = self.residents.times(leader)
        updates = []
        for index, hypothesis in enumerate(hypotheses):
            reason = FinishReason.STOP if hypothesis.stopped else FinishReason.LENGTH
            counters.finished[reason.value] += 1
            counters.num_generation_tokens += len(hypothesis.token_ids)
            update = SequenceUpdate(
                request.request_id,
                index,
                hypothesis.token_ids,
                hypothesis.logprobs,
                finish_reason=reason,
                stop_token_id=hypothesis.stop_token_id,
                cached=leader.cached,
                times=times,
                score=hypothesis.score,
                num_choices=len(hypotheses),
            )
            updates.append(update)
        return updates

    def _leave(self) -> None:
        if self.leader.row is None:
            self.leader.status = SequenceStatus.FINISHED
            self.residents.waiting.discard()
        for member in self.members:
            if member.row is not None:
                self.residents.leave(member)
            else:
                self.residents.swapper.drop(member)
            member.status = SequenceStatus.FINISHED
            self.residents.forget(member)

    def _take_reserved_row(self) -> None:
        self.residents.rows.unreserve(1)
        self.leader.num_forks_wanted -= 1
