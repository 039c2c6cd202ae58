//! Tests of [`super`]: what is written is read, and damage of any kind is seen.

use proptest::prelude::*;

use super::*;
use crate::storage::state::tests::initial;

const ORIGIN: Origin = Origin { stream: RandomId([5; 16]), shard: ShardId(3), replica: ReplicaId(8) };

fn key(text: &str) -> Vec<u8> {
    [&[keys::KIND_USER], text.as_bytes()].concat()
}

fn write(key: &str, value: impl Into<Bytes>) -> Record {
    Record::Change(self::key(key), Some(value.into()))
}

fn encode(records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = SnapshotWriter::new(&mut bytes, ORIGIN).unwrap();
    for record in records {
        match record {
            Record::Change(key, value) => writer.change(key, value.as_deref()).unwrap(),
            Record::Overlay => writer.overlay().unwrap(),
        }
    }
    let summary = writer.finish(&initial()).unwrap();
    let count = writer.bytes();
    assert_eq!(summary.header, initial());
    assert_eq!(count, bytes.len() as u64);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Vec<Record>, String> {
    let read = || -> Result<Vec<Record>, ReadError> {
        let mut reader = SnapshotReader::new(bytes)?;
        assert_eq!(reader.origin(), ORIGIN, "a head that is believed");
        let mut records = Vec::new();
        while let Some(record) = reader.read()? {
            records.push(record);
        }
        assert_eq!(reader.summary().unwrap().header, initial());
        assert_eq!(reader.bytes(), bytes.len() as u64);
        Ok(records)
    };
    read().map_err(|error| match error {
        ReadError::Io(error) => panic!("{error}"),
        ReadError::Damaged(detail) => detail,
    })
}

fn sample() -> Vec<Record> {
    vec![
        write("a", "one"),
        write("b", ""),
        Record::Change(vec![7, 1, 2], Some("another kind".into())),
        Record::Overlay,
        Record::Change(key("a"), None),
        write("c", "three"),
        Record::Overlay,
        Record::Overlay,
        write("a", "four"),
    ]
}

/// The places of the blocks in the bytes of a snapshot, with their lengths and sums.
fn blocks(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut blocks = Vec::new();
    let mut at = HEAD_BYTES;
    loop {
        let len = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        if len == 0 {
            return blocks;
        }
        blocks.push(at..at + len + 8);
        at += len + 8;
    }
}

#[test]
fn records_come_back() {
    for records in [sample(), Vec::new(), vec![Record::Overlay]] {
        assert_eq!(decode(&encode(&records)).unwrap(), records);
    }
}

#[test]
fn records_lie_across_blocks() {
    let size = limits::SNAPSHOT_BLOCK_BYTES;
    for less in 0..24 {
        let records = [write("a", vec![1; size - less]), write("b", vec![2; 3 * size]), write("c", "3")];
        let bytes = encode(&records);
        assert!(blocks(&bytes).iter().all(|block| block.len() <= size + 8));
        assert_eq!(decode(&bytes).unwrap(), records);
    }
}

#[test]
fn every_cut_and_every_flipped_bit_is_seen() {
    let bytes = encode(&sample());
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err(), "cut at {len}");
    }
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[place] ^= 1 << bit;
            assert!(decode(&flipped).is_err(), "bit {bit} flipped at {place}");
        }
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(decode(&longer).unwrap_err().contains("follows its end"));
}

/// Each block is whole by itself: only the sum of the whole sees these.
#[test]
fn whole_blocks_that_are_missing_doubled_or_swapped_are_seen() {
    let value = || vec![b'v'; limits::SNAPSHOT_BLOCK_BYTES];
    // A value of many equal blocks: no record looks odd, whatever happens to them.
    let bytes = encode(&[write("a", value().repeat(6)), Record::Overlay, write("b", value())]);
    let blocks = blocks(&bytes);
    assert!(blocks.len() > 6);
    let (one, two) = (&bytes[blocks[1].clone()], &bytes[blocks[2].clone()]);
    assert_eq!(one, two, "so that only a place tells them apart");
    let mut distinct = bytes.clone();
    let place = blocks[2].start + 100;
    distinct[place] = b'w';
    let len: [u8; 4] = distinct[blocks[2].start..][..4].try_into().unwrap();
    let sum = block_sum(len, &distinct[blocks[2].start + 4..blocks[2].end - 4]);
    distinct[blocks[2].end - 4..blocks[2].end].copy_from_slice(&sum.to_be_bytes());
    let detail = decode(&distinct).unwrap_err();
    assert_eq!(detail, "its checksum does not match", "a block of another snapshot");

    let missing = [&bytes[..blocks[1].start], &bytes[blocks[1].end..]].concat();
    assert!(decode(&missing).is_err());
    let doubled = [&bytes[..blocks[1].end], &bytes[blocks[1].start..]].concat();
    assert!(decode(&doubled).is_err());
}

#[test]
fn what_a_writer_refuses() {
    let mut writer = SnapshotWriter::new(Vec::new(), ORIGIN).unwrap();
    writer.change(&key("b"), Some(b"1")).unwrap();
    for bad in [&key("b")[..], &key("a"), &[], &[keys::KIND_HEADER]] {
        assert!(writer.change(bad, Some(b"2")).is_err(), "{bad:?}");
    }
    assert!(writer.change(&key("c"), None).is_err(), "a removal in the scan");
    writer.overlay().unwrap();
    writer.change(&key("a"), None).unwrap();
}

/// Well-formed to every checksum, and still not believed.
#[test]
fn hostile_records_are_refused_without_asking_for_memory() {
    let forge = |records: &[u8]| {
        let mut bytes = Vec::new();
        let mut writer = SnapshotWriter::new(&mut bytes, ORIGIN).unwrap();
        writer.record(records).unwrap();
        writer.finish(&initial()).unwrap();
        decode(&bytes).unwrap_err()
    };
    let huge = u32::MAX.to_be_bytes();
    assert!(forge(&[&[WRITE], &huge[..], &[0; 4]].concat()).contains("a key of"));
    assert!(forge(&[&[WRITE], &[0, 0, 0, 1][..], &huge].concat()).contains("a value of"));
    let long = (limits::FRAME_BYTES_MAX as u32).to_be_bytes();
    assert!(forge(&[&[WRITE], &[0, 0, 0, 1][..], &long, b"k"].concat()).contains("over the end"));
    assert!(forge(&[REMOVAL, 0, 0, 0, 1, keys::KIND_USER]).contains("first part"));
    assert!(forge(&[OVERLAY, REMOVAL, 0, 0, 0, 1, keys::KIND_HEADER]).contains("a header"));
    assert!(forge(&[OVERLAY, REMOVAL, 0, 0, 0, 0]).contains("an empty key"));
    assert!(forge(&[9]).contains("unknown kind"));
    assert!(forge(&[REMOVAL, 0]).contains("over the end"));
    let uncounted = forge(&[WRITE, 0, 0, 0, 1, 0, 0, 0, 0, keys::KIND_USER]);
    assert!(uncounted.contains("as many records"), "{uncounted}");
}

#[test]
fn an_incomplete_file_is_whole_up_to_its_last_whole_block() {
    let size = limits::SNAPSHOT_BLOCK_BYTES;
    let bytes = encode(&[write("a", vec![1; 3 * size])]);
    let blocks = blocks(&bytes);
    let whole = |bytes: &[u8]| whole_beginning(bytes).unwrap();
    assert_eq!(whole(&[]), (None, 0));
    assert_eq!(whole(&bytes[..HEAD_BYTES - 1]), (None, 0));
    assert_eq!(whole(&bytes[..HEAD_BYTES]), (Some(ORIGIN), HEAD_BYTES as u64));
    let mut damaged = bytes.clone();
    damaged[3] ^= 1;
    assert_eq!(whole(&damaged), (None, 0));
    for block in &blocks {
        for (len, expected) in
            [(block.end - 1, block.start), (block.end, block.end), (block.start + 3, block.start)]
        {
            assert_eq!(whole(&bytes[..len]), (Some(ORIGIN), expected as u64), "cut at {len}");
        }
        let mut damaged = bytes.clone();
        damaged[block.start + 5] ^= 1;
        assert_eq!(whole(&damaged), (Some(ORIGIN), block.start as u64));
    }
    let end = blocks.last().unwrap().end as u64;
    assert_eq!(whole(&bytes), (Some(ORIGIN), end), "the end is fetched again");
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let pairs = || {
        proptest::collection::btree_map(
            proptest::collection::vec(1..=255u8, 1..40),
            (any::<bool>(), prop_oneof![4 => 0..200usize, 1 => 0..600_000usize], any::<u8>()),
            0..12,
        )
    };
    (pairs(), proptest::collection::vec(pairs(), 0..4)).prop_map(|(scan, overlays)| {
        let value = |(_, len, fill): (bool, usize, u8)| Bytes::from(vec![fill; len]);
        let mut records: Vec<_> =
            scan.into_iter().map(|(key, it)| Record::Change(key, Some(value(it)))).collect();
        for overlay in overlays {
            records.push(Record::Overlay);
            records.extend(overlay.into_iter().map(|(key, it)| Record::Change(key, it.0.then(|| value(it)))));
        }
        records
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What is written is read back; with any bytes changed, cut out or put in anywhere, nothing is.
    #[test]
    fn damage_is_never_taken_for_a_snapshot(
        records in records(),
        place in any::<prop::sample::Index>(),
        (cut, put) in (0..3usize, proptest::collection::vec(any::<u8>(), 0..3)),
    ) {
        let bytes = encode(&records);
        prop_assert_eq!(&decode(&bytes).unwrap(), &records);
        let place = place.index(bytes.len());
        let cut = cut.min(bytes.len() - place);
        let damaged = [&bytes[..place], &put, &bytes[place + cut..]].concat();
        if damaged != bytes {
            prop_assert!(decode(&damaged).is_err());
        }
    }

    /// Bytes of no meaning are errors, not panics, and no memory is asked for on their word.
    #[test]
    fn noise_does_not_panic(noise in proptest::collection::vec(any::<u8>(), 0..300), at in 0..200usize) {
        prop_assert!(SnapshotReader::new(&noise[..]).is_err());
        let mut bytes = encode(&sample());
        let at = at.min(bytes.len());
        bytes.truncate(at);
        bytes.extend_from_slice(&noise);
        prop_assert!(decode(&bytes).is_err());
    }
}
