//! What the `group` scripts print of messages and answers, and how a write names its session.

use pontoon::group::types::Output;
use pontoon::ids::{RandomId, ReplicaId};
use pontoon::machine::command::{Answer, KvReply, Reply, Versioned};
use pontoon::machine::session::SessionTag;
use pontoon::placement::map::{Member, MemberRole};
use pontoon::refusal::Refusal;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};

use crate::script::{self, quoted};

/// The tag of a write that names a session.
pub fn tag(line: &script::Command) -> Result<Option<SessionTag>, String> {
    if line.named("session").is_none() {
        return Ok(None);
    }
    Ok(Some(SessionTag {
        session: RandomId([line.named_number("session", 0)?; 16]),
        sequence: line.named_number("seq", 0)?,
        acked_below: line.named_number("acked", 0)?,
        open: line.named("open").map(|_| line.named_number("open", 0)).transpose()?,
    }))
}

/// The ids behind the first word.
pub fn ids(line: &script::Command) -> Result<Vec<u64>, String> {
    (1..).take_while(|at| line.word(*at).is_ok()).map(|at| line.number(at)).collect()
}

/// The replicas that a named word lists, separated by commas.
pub fn listed(line: &script::Command, name: &str) -> Result<Vec<ReplicaId>, String> {
    let Some(list) = line.named_text(name)? else { return Ok(Vec::new()) };
    let id = |word: &str| word.parse().map(ReplicaId).map_err(|_| format!("`{word}` is no replica"));
    list.split(',').map(id).collect()
}

/// Members in one line: those that aren't voters in both configurations with a mark.
pub fn members(members: &[Member]) -> String {
    let words: Vec<_> = (members.iter())
        .map(|m| match m.role {
            MemberRole::Voter => format!("{}", m.replica),
            MemberRole::Learner => format!("{} learns", m.replica),
            MemberRole::Incoming => format!("{} comes", m.replica),
            MemberRole::Outgoing => format!("{} goes", m.replica),
        })
        .collect();
    if words.is_empty() { "nobody".into() } else { words.join(", ") }
}

/// A message in one line.
pub fn describe(message: &Message) -> String {
    let term = message.term;
    let kind = format!("{:?}", message.get_msg_type());
    let kind = kind.strip_prefix("Msg").unwrap_or(&kind);
    let round = if message.context.is_empty() { "" } else { ", read round" };
    match message.get_msg_type() {
        MessageType::MsgAppend => {
            let after = format!("after {} of term {}", message.index, message.log_term);
            format!("{kind} term {term}, {after}{}, commit {}", entries(&message.entries), message.commit)
        }
        MessageType::MsgAppendResponse if message.reject => {
            format!("{kind} term {term}, rejects {}, has {}", message.index, message.reject_hint)
        }
        MessageType::MsgAppendResponse => format!("{kind} term {term}, has {}", message.index),
        MessageType::MsgHeartbeat => format!("{kind} term {term}, commit {}{round}", message.commit),
        MessageType::MsgHeartbeatResponse if message.request_snapshot > 0 => {
            format!("{kind} term {term}{round}, needs a snapshot of {} or later", message.request_snapshot)
        }
        MessageType::MsgHeartbeatResponse => format!("{kind} term {term}{round}"),
        MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => {
            format!("{kind} term {term}, log to {} of term {}", message.index, message.log_term)
        }
        MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse => {
            let vote = if message.reject { "no" } else { "yes" };
            format!("{kind} term {term}, {vote}")
        }
        _ => format!("{kind} term {term}"),
    }
}

/// Entries at the end of a line.
pub fn entries(entries: &[Entry]) -> String {
    let kind = |e: &Entry| match e.get_entry_type() {
        EntryType::EntryNormal => "",
        _ => " (members)",
    };
    let words: Vec<_> =
        entries.iter().map(|e| format!("{} of term {}{}", e.index, e.term, kind(e))).collect();
    if words.is_empty() { String::new() } else { format!(", entries [{}]", words.join(", ")) }
}

/// What became of an operation.
pub fn end(result: &Result<Output, Refusal>) -> String {
    let found = |value: &Option<Versioned>| match value {
        Some(found) => format!("{} version {}", quoted(&found.value), found.version),
        None => "absent".into(),
    };
    match result {
        Ok(Output::Reply(Reply::Kv(KvReply::Written(version)))) => format!("written, version {version}"),
        Ok(Output::Answer(Answer::Value(value))) => format!("is {}", found(value)),
        Ok(Output::Changed(conf)) => format!("in force, conf version {conf}"),
        Ok(other) => format!("{other:?}"),
        Err(refusal) => {
            let hint = match refusal {
                Refusal::NotLeader { leader: Some(leader), .. } => format!("; ask node {leader}"),
                _ => String::new(),
            };
            format!("{:?}: {refusal}{hint}", refusal.outcome())
        }
    }
}
