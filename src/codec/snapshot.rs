//! Steps of a snapshot's way to a follower, as frames of the lane `snapshot`.

use bytes::Bytes;

use super::CodecError;
use super::hello::printable;
use super::messages::POSITION_MAX;
use super::records::{malformed, read_id};
use crate::ids::{Epoch, Position, ReplicaId, ShardId, StreamId, Term};
use crate::limits::SNAPSHOT_CHUNK_BYTES;
use crate::schema::peer_capnp::{snapshot_answer, snapshot_frame, snapshot_offer};

/// Bytes of a frame with a chunk beyond the chunk's own, more than enough.
const CHUNK_OVERHEAD_BYTES: usize = 128;

/// One step of a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SnapshotFrame {
    /// From the dialler, first and once.
    Offer(SnapshotOffer),
    /// From the dialler: bytes of the file.
    Chunk {
        /// Where they belong.
        offset: u64,
        /// At least one byte, at most [`SNAPSHOT_CHUNK_BYTES`].
        data: Bytes,
    },
    /// From the dialler: that was the whole file.
    End,
    /// From the acceptor.
    Answer(SnapshotAnswer),
}

/// Which snapshot, and for whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotOffer {
    /// Names the file: a part of it that was received before counts.
    pub stream: StreamId,
    /// The shard.
    pub shard: ShardId,
    /// The leader that offers it.
    pub from: ReplicaId,
    /// The follower that needs it.
    pub to: ReplicaId,
    /// Epoch of the shard as the leader knows it.
    pub epoch: Epoch,
    /// The last entry in it.
    pub position: Position,
    /// Term of the leader; at least that of the entry.
    pub leader_term: Term,
    /// Size of the whole file.
    pub bytes: u64,
}

/// What the receiving node says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SnapshotAnswer {
    /// Send from this byte on.
    ResumeAt(u64),
    /// The replica has all that is in it.
    NotNeeded,
    /// Not now.
    Busy {
        /// Milliseconds after which to offer it again.
        retry_after_ms: u32,
    },
    /// Never; why, for the log.
    Refused(String),
    /// Still looking at what there is of it, or checking and loading the whole.
    Working,
    /// The replica stands at the snapshot, durably.
    Installed,
    /// The file can't be used; why, for the log.
    Failed(String),
}

impl SnapshotFrame {
    /// Bytes it takes in a frame, about.
    pub(super) fn size(&self) -> usize {
        match self {
            SnapshotFrame::Chunk { data, .. } => data.len() + CHUNK_OVERHEAD_BYTES,
            _ => 256,
        }
    }
}

pub(super) fn write_snapshot(frame: &SnapshotFrame, mut to: snapshot_frame::Builder<'_>) {
    match frame {
        SnapshotFrame::Offer(offer) => write_offer(offer, to.init_offer()),
        SnapshotFrame::Chunk { offset, data } => {
            let mut to = to.init_chunk();
            to.set_offset(*offset);
            to.set_data(data);
        }
        SnapshotFrame::End => to.set_end(()),
        SnapshotFrame::Answer(answer) => write_answer(answer, to.init_answer()),
    }
}

fn write_offer(offer: &SnapshotOffer, mut to: snapshot_offer::Builder<'_>) {
    to.set_stream(&offer.stream.0);
    to.set_shard(offer.shard.0);
    to.set_from(offer.from.0);
    to.set_to(offer.to.0);
    let mut epoch = to.reborrow().init_epoch();
    epoch.set_range(offer.epoch.range);
    epoch.set_conf(offer.epoch.conf);
    to.set_index(offer.position.index);
    to.set_term(offer.position.term);
    to.set_leader_term(offer.leader_term);
    to.set_bytes(offer.bytes);
}

fn write_answer(answer: &SnapshotAnswer, mut to: snapshot_answer::Builder<'_>) {
    match answer {
        SnapshotAnswer::ResumeAt(offset) => to.set_resume_at(*offset),
        SnapshotAnswer::NotNeeded => to.set_not_needed(()),
        SnapshotAnswer::Busy { retry_after_ms } => to.set_busy(*retry_after_ms),
        SnapshotAnswer::Refused(reason) => to.set_refused(printable(reason).as_str()),
        SnapshotAnswer::Working => to.set_working(()),
        SnapshotAnswer::Installed => to.set_installed(()),
        SnapshotAnswer::Failed(reason) => to.set_failed(printable(reason).as_str()),
    }
}

/// Reads one.
pub(super) fn read_snapshot(from: snapshot_frame::Reader<'_>) -> Result<SnapshotFrame, CodecError> {
    Ok(match from.which()? {
        snapshot_frame::Offer(offer) => SnapshotFrame::Offer(read_offer(offer?)?),
        snapshot_frame::Chunk(chunk) => {
            let chunk = chunk?;
            let data = chunk.get_data()?;
            if data.is_empty() || data.len() > SNAPSHOT_CHUNK_BYTES {
                return Err(malformed("SnapshotChunk", format!("{} bytes", data.len())));
            }
            SnapshotFrame::Chunk { offset: chunk.get_offset(), data: Bytes::copy_from_slice(data) }
        }
        snapshot_frame::End(()) => SnapshotFrame::End,
        snapshot_frame::Answer(answer) => SnapshotFrame::Answer(read_answer(answer?)?),
    })
}

fn read_offer(from: snapshot_offer::Reader<'_>) -> Result<SnapshotOffer, CodecError> {
    let wrong = |detail: String| malformed("SnapshotOffer", detail);
    let epoch = from.get_epoch()?;
    let offer = SnapshotOffer {
        stream: read_id("stream", from.get_stream()?)?,
        shard: ShardId(from.get_shard()),
        from: ReplicaId(from.get_from()),
        to: ReplicaId(from.get_to()),
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        position: Position { index: from.get_index(), term: from.get_term() },
        leader_term: from.get_leader_term(),
        bytes: from.get_bytes(),
    };
    if offer.from.0 == 0 || offer.to.0 == 0 || offer.from == offer.to {
        return Err(wrong(format!("from replica {} to replica {}", offer.from, offer.to)));
    }
    let Position { index, term } = offer.position;
    if index == 0 || index > POSITION_MAX || term == 0 || term > offer.leader_term {
        return Err(wrong(format!(
            "index {index} of term {term}, by a leader of term {}",
            offer.leader_term
        )));
    }
    if offer.leader_term > POSITION_MAX {
        return Err(wrong(format!("a leader of term {}", offer.leader_term)));
    }
    if offer.bytes == 0 {
        return Err(wrong("an empty file".into()));
    }
    Ok(offer)
}

fn read_answer(from: snapshot_answer::Reader<'_>) -> Result<SnapshotAnswer, CodecError> {
    let text = |text: capnp::Result<capnp::text::Reader<'_>>| -> Result<String, CodecError> {
        Ok(printable(&String::from_utf8_lossy(text?.as_bytes())))
    };
    Ok(match from.which()? {
        snapshot_answer::ResumeAt(offset) => SnapshotAnswer::ResumeAt(offset),
        snapshot_answer::NotNeeded(()) => SnapshotAnswer::NotNeeded,
        snapshot_answer::Busy(retry_after_ms) => SnapshotAnswer::Busy { retry_after_ms },
        snapshot_answer::Refused(reason) => SnapshotAnswer::Refused(text(reason)?),
        snapshot_answer::Working(()) => SnapshotAnswer::Working,
        snapshot_answer::Installed(()) => SnapshotAnswer::Installed,
        snapshot_answer::Failed(reason) => SnapshotAnswer::Failed(text(reason)?),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::codec::peer::{PeerFrame, decode, encode};
    use crate::codec::records::tests::any_id;
    use crate::limits::{REFUSAL_BYTES_MAX, SNAPSHOT_FRAME_BYTES_MAX};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn any_offer() -> impl Strategy<Value = SnapshotOffer> {
        let epoch = (any::<u64>(), any::<u64>()).prop_map(|(range, conf)| Epoch { range, conf });
        let terms = (1..1000u64, 0..1000u64);
        (any_id(), any::<u64>(), 1..u64::MAX, epoch, 1..POSITION_MAX, terms, 1..u64::MAX).prop_map(
            |(stream, shard, from, epoch, index, (term, more), bytes)| SnapshotOffer {
                stream,
                shard: ShardId(shard),
                from: ReplicaId(from),
                to: ReplicaId(from ^ 1).max(ReplicaId(2)),
                epoch,
                position: Position { index, term },
                leader_term: term + more,
                bytes,
            },
        )
    }

    pub(in crate::codec) fn any_snapshot_frame() -> impl Strategy<Value = SnapshotFrame> {
        let answer = prop_oneof![
            any::<u64>().prop_map(SnapshotAnswer::ResumeAt),
            Just(SnapshotAnswer::NotNeeded),
            any::<u32>().prop_map(|retry_after_ms| SnapshotAnswer::Busy { retry_after_ms }),
            "[a-z ]{0,20}".prop_map(SnapshotAnswer::Refused),
            Just(SnapshotAnswer::Working),
            Just(SnapshotAnswer::Installed),
            "[a-z ]{0,20}".prop_map(SnapshotAnswer::Failed),
        ];
        prop_oneof![
            any_offer().prop_map(SnapshotFrame::Offer),
            (any::<u64>(), vec(any::<u8>(), 1..200))
                .prop_map(|(offset, data)| SnapshotFrame::Chunk { offset, data: data.into() }),
            Just(SnapshotFrame::End),
            answer.prop_map(SnapshotFrame::Answer),
        ]
    }

    fn encoded(frame: SnapshotFrame) -> Bytes {
        let mut out = Vec::new();
        encode(&PeerFrame::Snapshot(frame), &mut out).unwrap();
        out.into()
    }

    #[test]
    fn the_greatest_chunk_fits_its_frame_and_a_greater_one_is_malformed() {
        let chunk = |bytes| SnapshotFrame::Chunk { offset: 1, data: vec![7; bytes].into() };
        let bytes = encoded(chunk(SNAPSHOT_CHUNK_BYTES));
        assert!(bytes.len() <= SNAPSHOT_FRAME_BYTES_MAX);
        assert!(bytes.len() <= SNAPSHOT_CHUNK_BYTES + CHUNK_OVERHEAD_BYTES);
        assert!(decode(bytes).is_ok());
        for wrong in [0, SNAPSHOT_CHUNK_BYTES + 1] {
            assert!(decode(encoded(chunk(wrong))).is_err(), "{wrong}");
        }
    }

    #[test]
    fn offers_that_make_no_sense_are_malformed() {
        let sound = SnapshotOffer {
            stream: crate::ids::RandomId([1; 16]),
            shard: ShardId(0),
            from: ReplicaId(1),
            to: ReplicaId(2),
            epoch: Epoch::default(),
            position: Position { index: 6, term: 5 },
            leader_term: 5,
            bytes: 1,
        };
        assert!(decode(encoded(SnapshotFrame::Offer(sound))).is_ok());
        let wrong: [fn(&mut SnapshotOffer); 8] = [
            |o| o.from = ReplicaId(0),
            |o| o.to = ReplicaId(0),
            |o| o.to = o.from,
            |o| o.position.index = 0,
            |o| o.position.term = 0,
            |o| o.position.term = 6,
            |o| o.leader_term = u64::MAX,
            |o| o.bytes = 0,
        ];
        for (case, change) in wrong.iter().enumerate() {
            let mut offer = sound;
            change(&mut offer);
            assert!(decode(encoded(SnapshotFrame::Offer(offer))).is_err(), "case {case}");
        }
    }

    #[test]
    fn reasons_are_cut_and_made_printable() {
        let reason = format!("no\n{}", "x".repeat(2 * REFUSAL_BYTES_MAX));
        let frame = SnapshotFrame::Answer(SnapshotAnswer::Failed(reason));
        match decode(encoded(frame)) {
            Ok(PeerFrame::Snapshot(SnapshotFrame::Answer(SnapshotAnswer::Failed(read)))) => {
                assert_eq!(read.len(), REFUSAL_BYTES_MAX);
                assert!(read.starts_with("no x"));
            }
            other => panic!("{other:?}"),
        }
    }
}
