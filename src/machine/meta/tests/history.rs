//! Any history of commands, sensible or mad, keeps the map sound. [`run`] checks it after each.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::machine::command::{PlannedTarget, PolicyChange};
use crate::placement::map::{MoveCause, RebalanceState};
use MemberRole::{Incoming, Learner, Outgoing, Voter};

/// Numbers that choose a command when the map is known that it meets.
pub(super) type Choice = (u8, [u8; 4]);

/// A command for this map: often one that fits it, sometimes one of somebody who is mad or late.
pub(super) fn command((kind, [a, b, c, d]): Choice, map: &ClusterMap) -> Option<MetaCommand> {
    let name = format!("db{}", a % 3);
    let number = usize::from(a) % map.shards.len();
    let (id, record) = map.shards.iter().nth(number).unwrap();
    // One in eight is wrong by one.
    let off = |number: u64| if d % 8 == 7 { number.wrapping_sub(1) } else { number };
    let move_id = off(record.moving.as_ref().map_or(0, |moving| moving.id));
    let (shard, conf) = (*id, off(record.epoch.conf));
    let nodes = |bits: u8| (0..8).filter(move |bit| bits >> bit & 1 == 1).map(|bit| NodeId(bit + 1));
    Some(match kind {
        0 => MetaCommand::AddNode(node(a % 8 + 1)),
        1 => {
            use Standing::{Draining, Leaving, Pending, Removed};
            let all = [Standing::Member, Standing::Member, Draining, Leaving, Pending, Removed];
            standings::stand(u64::from(a % 8 + 1), all[usize::from(b) % all.len()])
        }
        2 => {
            let (replicas, shards) = (u32::from(b % 3 + 1), u32::from(c % 4 + 1));
            let shards = plan_database(map, &name, replicas, shards).ok()?;
            MetaCommand::CreateDatabase { name, replicas, shards }
        }
        3 if b % 4 == 0 => MetaCommand::DropDatabase { name, id: None },
        3 => MetaCommand::SetReplicas { name, replicas: u32::from(b % 9) },
        4 | 5 => {
            let members = record.members.iter().enumerate();
            let going = members.filter(|(at, _)| c >> at & 1 == 1 && c >> 7 == 0);
            let causes = [MoveCause::Rebalance, MoveCause::Repair];
            MetaCommand::BeginMove {
                shard,
                conf,
                adds: nodes(b & b.rotate_left(3)).collect(),
                removes: going.map(|(_, member)| member.replica).collect(),
                cause: causes[usize::from(kind == 5)],
            }
        }
        6 => MetaCommand::CancelMove { shard, id: move_id },
        7 | 8 => MetaCommand::EndMove { shard, id: move_id },
        9..=12 => {
            MetaCommand::ObserveShard { shard, conf: off(record.epoch.conf) + 1, members: next(record) }
        }
        13 => {
            // Roles at random, of members and strangers.
            let roles = [Voter, Learner, Incoming, Outgoing];
            let member = |(at, member): (u32, &Member)| {
                let role = roles[usize::from(b.rotate_left(at * 2) % 4)];
                let replica = if d == 0 { ReplicaId(u64::from(c)) } else { member.replica };
                (c >> at & 1 == 0).then_some(Member { replica, role, ..*member })
            };
            let members = (0..).zip(record.ordered()).filter_map(member).collect();
            MetaCommand::ObserveShard { shard, conf: record.epoch.conf + u64::from(a % 2), members }
        }
        14 => MetaCommand::SetPolicy(match a % 3 {
            0 => PolicyChange::ApproveJoins(b % 2 == 0),
            1 => PolicyChange::MovesAtATime(u32::from(b)),
            _ => PolicyChange::Automatic(b % 2 == 0),
        }),
        15 => {
            let chosen = map.shards.values().enumerate().filter(|(at, _)| b >> (at % 8) & 1 == 1);
            let target = |(_, shard): (usize, &ShardRecord)| PlannedTarget {
                shard: shard.id,
                conf: off(shard.epoch.conf),
                nodes: nodes(c).collect(),
            };
            let plan = u64::from(a % 3);
            MetaCommand::BeginRebalance {
                plan,
                undoes: 0,
                targets: chosen.map(target).collect(),
                moves: 1,
                bytes: 1,
            }
        }
        16 => {
            use RebalanceState::{Cancelling, Failed, Idle, Paused, Running};
            let state = [Idle, Running, Paused, Cancelling, Failed][usize::from(b) % 5];
            MetaCommand::ControlRebalance { plan: off(map.rebalance.plan), state, reason: "r".into() }
        }
        _ => {
            let keep = record.members[usize::from(b) % record.members.len()].replica;
            MetaCommand::RecoverShard { shard, keep, conf: conf + u64::from(c % 2) }
        }
    })
}

/// What the shard says after its next step.
fn next(record: &ShardRecord) -> Vec<Member> {
    let mut members = record.members.clone();
    let Some(moving) = &record.moving else {
        return members;
    };
    let is_joint = members.iter().any(|member| matches!(member.role, Incoming | Outgoing));
    let missing = moving.adds.iter().filter(|add| record.node_of(add.replica).is_none());
    let missing: Vec<Member> = missing.copied().collect();
    if is_joint {
        members.retain(|member| member.role != Outgoing);
        members.iter_mut().filter(|member| member.role == Incoming).for_each(|member| member.role = Voter);
    } else if moving.cancelling {
        members.retain(|member| moving.adds.iter().all(|add| add.replica != member.replica));
    } else if missing.is_empty() {
        for member in &mut members {
            member.role = match member.role {
                Voter if moving.removes.contains(&member.replica) => Outgoing,
                Learner => Incoming,
                role => role,
            };
        }
    } else {
        members.extend(missing);
    }
    members
}

pub(super) fn any_choice() -> impl Strategy<Value = Choice> {
    (0..18_u8, any::<[u8; 4]>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_history_keeps_the_map_sound(choices in prop::collection::vec(any_choice(), 0..120)) {
        let mut state = formed(3);
        let mut replicas = BTreeMap::new();
        for choice in choices {
            let map = cluster_map(&state).unwrap();
            let Some(command) = command(choice, &map) else {
                continue;
            };
            run(&command, &mut state);
            // An id is never used again, not even for a replica that was forgotten in between.
            for shard in cluster_map(&state).unwrap().shards.values() {
                for member in shard.ordered() {
                    let place = (shard.id, member.node);
                    prop_assert_eq!(*replicas.entry(member.replica).or_insert(place), place);
                }
            }
        }
    }
}

#[test]
fn the_checks_see_what_is_wrong() {
    let mut state = formed(3);
    run(&create("db", 2, 2, &state), &mut state);
    let map = cluster_map(&state).unwrap();
    let wrong = |change: fn(&mut ClusterMap)| {
        let mut map = map.clone();
        change(&mut map);
        check_map(&map).unwrap_err()
    };
    fn shard(map: &mut ClusterMap, id: u64) -> &mut ShardRecord {
        map.shards.get_mut(&ShardId(id)).unwrap()
    }
    assert_eq!(wrong(|map| map.version = 1), "a record changed after map version 1");
    assert_eq!(wrong(|map| shard(map, 1).members[0].replica.0 = 1), "replica 1 is of shards 0 and 1");
    assert_eq!(wrong(|map| shard(map, 0).members[0].node.0 = 2), "shard 0: two replicas on node 2");
    assert_eq!(
        wrong(|map| shard(map, 0).members.iter_mut().for_each(|member| member.role = Learner)),
        "shard 0: nobody votes"
    );
    assert_eq!(
        wrong(|map| drop(map.shards.remove(&ShardId(2)))),
        "database `db`: shard 2 is missing, or another's"
    );
    assert_eq!(
        wrong(|map| map.nodes.get_mut(&NodeId(1)).unwrap().standing = Standing::Removed),
        "shard 0: replica 1 is on node 1: Some(Removed)"
    );
    let changed = |change: fn(&mut ClusterMap)| {
        let mut after = map.clone();
        change(&mut after);
        check_change(&map, &after).unwrap_err()
    };
    assert_eq!(
        changed(|map| shard(map, 0).members[0].role = Learner),
        "shard 0: other members of conf version 1"
    );
    assert_eq!(changed(|map| drop(map.nodes.remove(&NodeId(1)))), "node 1 is forgotten");
    assert!(changed(|map| shard(map, 0).epoch.conf = 0).starts_with("shard 0: from "));
}
