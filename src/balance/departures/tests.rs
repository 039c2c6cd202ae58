//! Every mixture of well, silent, sick, leaving, dead and draining voters, followed to its end.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::balance::facts::{ShardReport, Survey};
use crate::balance::wants;
use crate::group::types::FollowerStatus;
use crate::ids::{DatabaseId, Epoch, NodeId, RandomId, ShardId};
use crate::placement::map::{ClusterMap, DatabaseRecord, NodeRecord, Standing};
use crate::placement::ring::RingRange;

const SHARD: ShardId = ShardId(1);
const REPLACE_AFTER_MS: u64 = 60_000;

/// How a node is, and with it the voter that it holds at first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Plight {
    Well,
    /// It doesn't answer, and not for so long yet that it is lost.
    Silent,
    /// The node is well, its voter isn't.
    Sick,
    /// It was given up, and runs still.
    GivenUp,
    /// It was given up, and doesn't answer.
    Dead,
    /// It hasn't answered for so long that it is lost.
    Gone,
    /// It is to be emptied.
    Draining,
}

use Plight::{Dead, Draining, GivenUp, Gone, Sick, Silent, Well};

const ALL: [Plight; 7] = [Well, Silent, Sick, GivenUp, Dead, Gone, Draining];

/// A shard whose moves succeed as soon as they are begun.
struct Patient {
    map: ClusterMap,
    nodes: BTreeMap<NodeId, Plight>,
    /// The replicas that were there at first: those on sick nodes are sick.
    first: BTreeSet<ReplicaId>,
    next: u64,
}

impl Patient {
    /// One voter on each of `voters`, and so many nodes besides that are well.
    fn new(voters: &[Plight], spare: usize, wanted: usize) -> Patient {
        let plights = voters.iter().copied().chain(std::iter::repeat_n(Well, spare));
        let nodes: BTreeMap<NodeId, Plight> = (1..).map(NodeId).zip(plights).collect();
        let standing = |plight: Plight| match plight {
            GivenUp | Dead => Standing::Leaving,
            Draining => Standing::Draining,
            Well | Silent | Sick | Gone => Standing::Member,
        };
        let record = |(id, plight): (&NodeId, &Plight)| NodeRecord {
            id: *id,
            label: String::new(),
            client_address: String::new(),
            peer_address: String::new(),
            zone: String::new(),
            weight: 100,
            store_id: RandomId::default(),
            standing: standing(*plight),
            changed_at: 1,
        };
        let voter = |id: u64| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Voter };
        let shard = ShardRecord {
            id: SHARD,
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: (1..=voters.len() as u64).map(voter).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 1,
        };
        let database = DatabaseRecord {
            id: DatabaseId(1),
            name: "db".into(),
            replicas: u32::try_from(wanted).unwrap(),
            shards: vec![SHARD],
            dropped: false,
            changed_at: 1,
        };
        let mut map = ClusterMap {
            version: 1,
            nodes: nodes.iter().map(|node| (*node.0, record(node))).collect(),
            databases: [(database.id, database)].into(),
            ..ClusterMap::default()
        };
        map.policy.replace_after_ms = REPLACE_AFTER_MS;
        let first = shard.members.iter().map(|member| member.replica).collect();
        map.shards.insert(SHARD, shard);
        Patient { map, nodes, first, next: 100 }
    }

    fn voters(&self) -> &[Member] {
        &self.map.shards[&SHARD].members
    }

    fn is_sick(&self, member: &Member) -> bool {
        self.nodes[&member.node] == Sick && self.first.contains(&member.replica)
    }

    fn answers(&self, member: &Member) -> bool {
        matches!(self.nodes[&member.node], Well | Sick | GivenUp | Draining) && !self.is_sick(member)
    }

    /// How many more voters may fall silent; `None` if too many are already.
    fn stands(&self, voters: &[Member]) -> Option<usize> {
        let answer = voters.iter().filter(|member| self.answers(member)).count();
        answer.checked_sub(voters.len() / 2 + 1)
    }

    /// Takes the next step. `Ok(false)`: nothing is wanted any more. `Err`: nothing can be done for now.
    fn step(&mut self) -> Result<bool, String> {
        let before = self.voters().to_vec();
        let leader = before.iter().find(|member| self.answers(member)).unwrap().replica;
        let followers = before.iter().filter(|member| member.replica != leader).map(|member| {
            let active = self.answers(member);
            FollowerStatus { replica: member.replica, matched: 9, active, caught_up: active }
        });
        let conf = self.next;
        let report = ShardReport {
            shard: SHARD,
            leader,
            term: 1,
            epoch: Epoch { range: 1, conf },
            members: before.clone(),
            followers: followers.collect(),
            last: 9,
            keys: 0,
            bytes: 0,
        };
        let lives = |plight: Plight| !matches!(plight, Silent | Dead | Gone);
        let surveys: Vec<Survey> = self
            .nodes
            .iter()
            .filter(|(_, plight)| lives(**plight))
            .map(|(node, _)| Survey {
                node: *node,
                disk_full: false,
                led: Vec::new(),
                held: Vec::new(),
                sick: Vec::new(),
                snapshot_bytes: 0,
            })
            .collect();
        let gone = self.nodes.iter().filter(|(_, plight)| **plight == Gone);
        let silence = gone.map(|(node, _)| (*node, REPLACE_AFTER_MS)).collect();
        let sick = before.iter().filter(|member| self.is_sick(member));
        let sick = sick.map(|member| ((SHARD, member.replica), "doesn't serve".into())).collect();
        let view = View::new(&self.map, surveys.iter(), &silence, sick);
        let node = before.iter().find(|member| member.replica == leader).unwrap().node;
        let (record, led) = (&self.map.shards[&SHARD], Led { node, report: &report });
        let Some(want) = wants::want(&view, record, led) else { return Ok(false) };
        let mut loads = Loads::new(&self.map, &view.unfit());
        let begin = wants::begin(&view, &mut loads, record, led, &want, &[])?;

        let mut after = before.clone();
        after.retain(|member| !begin.removes.contains(&member.replica));
        assert_eq!(after.len() + begin.removes.len(), before.len(), "only voters are removed, and once");
        for node in begin.adds {
            assert!(before.iter().all(|member| member.node != node), "two on one node");
            assert!(view.fit(node));
            self.next += 1;
            after.push(Member { replica: ReplicaId(self.next), node, role: MemberRole::Voter });
        }
        let (stood, stands) = (self.stands(&before), self.stands(&after));
        assert!(stands.is_some(), "{want:?} leaves {after:?}");
        let wanted = self.map.databases[&DatabaseId(1)].replicas as usize;
        assert!(before.len() > wanted || stands >= stood, "{want:?}: {stood:?} before, {stands:?} after");
        self.map.shards.get_mut(&SHARD).unwrap().members = after;
        Ok(true)
    }

    /// Goes on until all is well, or nothing can be done any more. Returns why not.
    fn heal(&mut self) -> Option<String> {
        for _ in 0..12 {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(why) => return Some(why),
            }
        }
        panic!("it comes to no end: {:?}", self.voters());
    }

    fn check(&mut self) {
        let stuck = self.heal();
        let voters = self.voters();
        let wanted = self.map.databases[&DatabaseId(1)].replicas as usize;
        assert!(voters.len() <= wanted, "{voters:?}: {stuck:?}");
        let useless =
            |member: &Member| matches!(self.nodes[&member.node], Dead | Gone) || self.is_sick(member);
        assert!(!voters.len().is_multiple_of(2) || !voters.iter().any(useless), "{voters:?}: {stuck:?}");
        if stuck.as_ref().is_some_and(|why| why.ends_with("no other node can take a replica")) {
            let free =
                |node: &NodeId| self.nodes[node] == Well && voters.iter().all(|member| member.node != *node);
            assert!(!self.nodes.keys().any(free), "what is in the way is another thing: {voters:?}");
        }
        if voters.iter().any(|member| self.nodes[&member.node] == Silent) {
            // It comes back, or is lost some day.
            return;
        }
        let takers = || self.nodes.iter().filter(|(_, plight)| matches!(plight, Well | Sick));
        if takers().count() >= wanted {
            assert_eq!(stuck, None, "{voters:?}");
        }
        if stuck.is_none() {
            assert_eq!(voters.len(), wanted);
            let sound =
                |member: &Member| takers().any(|(node, _)| *node == member.node) && !self.is_sick(member);
            assert!(voters.iter().all(sound), "{voters:?}");
        } else if voters.iter().any(|member| !takers().any(|(node, _)| *node == member.node)) {
            let used = takers().all(|(node, _)| voters.iter().any(|member| member.node == *node));
            assert!(used, "{voters:?}, and there is a node that could take one: {stuck:?}");
            assert!(!voters.iter().any(|member| self.is_sick(member)), "{voters:?}: {stuck:?}");
        }
    }
}

/// All ways to choose `count` plights, without regard to order.
fn mixtures(count: usize) -> Vec<Vec<Plight>> {
    let mut all = vec![Vec::new()];
    for _ in 0..count {
        let longer = |mixture: Vec<Plight>| {
            let least = mixture.last().copied().unwrap_or(Well);
            let more = ALL.into_iter().filter(move |plight| *plight >= least);
            more.map(move |plight| [&mixture[..], &[plight]].concat())
        };
        all = all.into_iter().flat_map(longer).collect();
    }
    all
}

#[test]
fn whatever_is_with_the_voters_each_step_leaves_a_majority_and_all_come_to_be_well() {
    let mut tried = 0;
    for count in 1..=5 {
        for mixture in mixtures(count) {
            let backwards: Vec<Plight> = mixture.iter().rev().copied().collect();
            let wanted = count.saturating_sub(2).max(1)..=count + 1;
            for (voters, spare, wanted) in [&mixture, &backwards]
                .into_iter()
                .flat_map(|voters| [(voters, 0), (voters, 1)])
                .flat_map(|(voters, spare)| wanted.clone().map(move |wanted| (voters, spare, wanted)))
            {
                let mut patient = Patient::new(voters, spare, wanted);
                if patient.stands(patient.voters()).is_some() {
                    println!("{voters:?} and {spare} more nodes, {wanted} wanted");
                    patient.check();
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 4_000, "only {tried}");
}

#[test]
fn a_shard_in_which_two_are_rotten_and_one_is_given_up_is_mended_on_the_nodes_that_it_has() {
    let mut patient = Patient::new(&[Well, GivenUp, Well, Sick, Sick], 0, 4);
    let mut nodes = Vec::new();
    while patient.step() == Ok(true) {
        nodes.push(patient.voters().iter().map(|member| member.node.0).collect::<Vec<_>>());
    }
    assert_eq!(nodes, [vec![1, 2, 3, 5], vec![1, 2, 3, 4], vec![1, 3, 4, 5]]);
}

#[test]
fn where_one_is_enough_a_silent_one_goes_beside_one_that_is_to_be_emptied() {
    let mut patient = Patient::new(&[Draining, Draining, Silent], 0, 1);
    assert_eq!(patient.step(), Ok(true));
    assert_eq!(patient.voters().iter().map(|member| member.node.0).collect::<Vec<_>>(), [1]);
    let why = patient.step().expect_err("there is no node for it");
    assert_eq!(why, "node 1 is to be emptied, and no other node can take a replica");
}
