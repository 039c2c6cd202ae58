//! A file system under the raft log that loses power.
//!
//! Each file has what its readers see, in memory, and what is on the disk: the real file. A write
//! changes the former; a sync brings the latter up to date. [`LossyFs::power_loss`] decides for each
//! change since the last sync whether it reached the disk whole, not at all, or torn: some of
//! its 512-byte sectors, in no order. From then on the file system is dead: it says yes to
//! everything and does nothing, so that what held it can be dropped. Names are durable at once,
//! since the log engine syncs directories behind the file system's back. After [`LossyFs::kill_after`],
//! which ends the process alone, all of these changes are there.
//!
//! It can be full: writes then take the bytes that are left, and fail. And a sync can be made to fail. As on Linux, what it should have synced is then forgotten: a later
//! sync succeeds without writing it.

use std::collections::HashMap;
use std::fs;
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pontoon::storage::log_disk::env::{FileSystem, Handle, Permission, WriteExt};

const SECTOR: usize = 512;

/// A small generator (splitmix64), so that a seed names a run for ever.
pub struct Rng(pub u64);

impl Rng {
    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// The file system. Clones share their files.
#[derive(Clone, Default)]
pub struct LossyFs {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Default)]
struct Disk {
    files: Vec<FileState>,
    names: HashMap<PathBuf, usize>,
    dead: bool,
    /// Changes, syncs, renames and deletions so far.
    operations: u64,
    /// Lose power at this operation, with this seed; without one, only the process ends.
    cut: Option<(u64, Option<u64>)>,
    syncs: u64,
    fail_sync: Option<u64>,
    /// Bytes that may still be written; `None`: any number.
    room: Option<usize>,
}

struct FileState {
    /// `None` once deleted.
    path: Option<PathBuf>,
    seen: Vec<u8>,
    pending: Vec<Change>,
    /// What a failed sync forgot.
    forgotten: Vec<Change>,
}

enum Change {
    Write { offset: usize, data: Vec<u8> },
    Resize(usize),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Change::Write { offset, data } => write_at(content, *offset, data),
            Change::Resize(len) => content.resize(*len, 0),
        }
    }

    fn apply_torn(&self, content: &mut Vec<u8>, rng: &mut Rng) {
        let Change::Write { offset, data } = self else {
            return self.apply(content);
        };
        let mut at = *offset;
        while at < offset + data.len() {
            let end = ((at / SECTOR + 1) * SECTOR).min(offset + data.len());
            if rng.below(2) == 0 {
                write_at(content, at, &data[at - offset..end - offset]);
            }
            at = end;
        }
    }
}

fn write_at(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if content.len() < offset + data.len() {
        content.resize(offset + data.len(), 0);
    }
    content[offset..offset + data.len()].copy_from_slice(data);
}

impl LossyFs {
    /// Loses power now.
    pub fn power_loss(&self, seed: u64) {
        self.lock().power_loss(Some(seed));
    }

    /// Loses power at the operation after the next `operations` ones.
    pub fn power_loss_after(&self, operations: u64, seed: u64) {
        let mut disk = self.lock();
        disk.cut = Some((disk.operations + operations, Some(seed)));
    }

    /// Kills the process at the operation after the next `operations` ones: whatever it has written stays.
    pub fn kill_after(&self, operations: u64) {
        let mut disk = self.lock();
        disk.cut = Some((disk.operations + operations, None));
    }

    /// Kills the process now: whatever it has written stays.
    pub fn kill(&self) {
        self.lock().power_loss(None);
    }

    /// Whether the power is gone.
    pub fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Makes the sync after the next `skip` ones fail.
    pub fn fail_sync_after(&self, skip: u64) {
        let mut disk = self.lock();
        disk.fail_sync = Some(disk.syncs + skip);
    }

    /// From now on only so many bytes can be written; `None`: any number.
    pub fn set_room(&self, room: Option<usize>) {
        self.lock().room = room;
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    fn power_loss(&mut self, seed: Option<u64>) {
        if self.dead {
            return;
        }
        self.dead = true;
        let mut rng = Rng(seed.unwrap_or(0));
        for file in &self.files {
            let changes = || file.forgotten.iter().chain(&file.pending);
            let Some(path) = &file.path else { continue };
            if changes().next().is_none() {
                continue;
            }
            let mut content = fs::read(path).expect("reading a file of the log");
            for change in changes() {
                match rng.below(3) {
                    _ if seed.is_none() => change.apply(&mut content),
                    0 => change.apply(&mut content),
                    1 => change.apply_torn(&mut content, &mut rng),
                    _ => {}
                }
            }
            fs::write(path, content).expect("writing a file of the log");
        }
    }

    /// Counts an operation. False: the power is gone, do nothing.
    fn operation(&mut self) -> bool {
        if let Some((at, seed)) = self.cut
            && self.operations >= at
        {
            self.power_loss(seed);
        }
        self.operations += 1;
        !self.dead
    }

    fn change(&mut self, id: usize, change: Change) {
        if self.dead {
            return;
        }
        // The change itself may be lost in part: the power goes after it was made.
        change.apply(&mut self.files[id].seen);
        self.files[id].pending.push(change);
        self.operation();
    }

    fn add(&mut self, path: &Path) -> Result<usize> {
        if let Some(id) = self.names.get(path) {
            return Ok(*id);
        }
        let seen = match fs::read(path) {
            // It would be there, had the power not gone.
            Err(_) if self.dead => Vec::new(),
            read => read?,
        };
        self.files.push(FileState {
            path: Some(path.to_path_buf()),
            seen,
            pending: Vec::new(),
            forgotten: Vec::new(),
        });
        self.names.insert(path.to_path_buf(), self.files.len() - 1);
        Ok(self.files.len() - 1)
    }
}

/// An open file.
pub struct LossyHandle {
    fs: LossyFs,
    id: usize,
}

impl Handle for LossyHandle {
    fn truncate(&self, offset: usize) -> Result<()> {
        self.fs.lock().change(self.id, Change::Resize(offset));
        Ok(())
    }

    fn file_size(&self) -> Result<usize> {
        Ok(self.fs.lock().files[self.id].seen.len())
    }

    fn sync(&self) -> Result<()> {
        let mut disk = self.fs.lock();
        if !disk.operation() {
            return Ok(());
        }
        let number = disk.syncs;
        disk.syncs += 1;
        let fail = disk.fail_sync == Some(number);
        let file = &mut disk.files[self.id];
        if fail {
            file.forgotten.append(&mut file.pending);
            return Err(Error::other("sync failed, as asked for by a test"));
        }
        let Some(path) = &file.path else {
            return Ok(());
        };
        if file.forgotten.is_empty() {
            fs::write(path, &file.seen)?;
        } else {
            let mut content = fs::read(path)?;
            for change in &file.pending {
                change.apply(&mut content);
            }
            fs::write(path, content)?;
        }
        file.pending.clear();
        Ok(())
    }
}

/// A position in an open file.
pub struct LossyCursor {
    handle: Arc<LossyHandle>,
    offset: usize,
}

impl Read for LossyCursor {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        let disk = self.handle.fs.lock();
        let seen = &disk.files[self.handle.id].seen;
        let rest = seen.get(self.offset..).unwrap_or(&[]);
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.offset += len;
        Ok(len)
    }
}

impl Write for LossyCursor {
    fn write(&mut self, buf: &[u8]) -> Result<usize> {
        let mut disk = self.handle.fs.lock();
        let taken = disk.room.map_or(buf.len(), |room| room.min(buf.len()));
        if let Some(room) = &mut disk.room {
            *room -= taken;
        }
        if taken == 0 && !buf.is_empty() {
            // As the engine's own file system says it, which is how it knows.
            return Err(Error::new(ErrorKind::StorageFull, "nospace"));
        }
        disk.change(self.handle.id, Change::Write { offset: self.offset, data: buf[..taken].to_vec() });
        self.offset += taken;
        Ok(taken)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Seek for LossyCursor {
    fn seek(&mut self, position: SeekFrom) -> Result<u64> {
        let from = |base: usize, by: i64| base.checked_add_signed(by as isize);
        let offset = match position {
            SeekFrom::Start(offset) => Some(offset as usize),
            SeekFrom::Current(by) => from(self.offset, by),
            SeekFrom::End(by) => from(self.handle.file_size()?, by),
        };
        self.offset = offset.ok_or_else(|| Error::other("seek before the start"))?;
        Ok(self.offset as u64)
    }
}

impl WriteExt for LossyCursor {
    fn truncate(&mut self, offset: usize) -> Result<()> {
        self.offset = offset;
        self.handle.truncate(offset)
    }

    fn allocate(&mut self, offset: usize, size: usize) -> Result<()> {
        let mut disk = self.handle.fs.lock();
        if disk.files[self.handle.id].seen.len() < offset + size {
            disk.change(self.handle.id, Change::Resize(offset + size));
        }
        Ok(())
    }
}

impl FileSystem for LossyFs {
    type Handle = LossyHandle;
    type Reader = LossyCursor;
    type Writer = LossyCursor;

    fn create<P: AsRef<Path>>(&self, path: P) -> Result<LossyHandle> {
        let mut disk = self.lock();
        if !disk.names.contains_key(path.as_ref()) && disk.operation() {
            fs::OpenOptions::new().create(true).append(true).open(path.as_ref())?;
        }
        let id = disk.add(path.as_ref())?;
        drop(disk);
        let fs = self.clone();
        Ok(LossyHandle { fs, id })
    }

    fn open<P: AsRef<Path>>(&self, path: P, _: Permission) -> Result<LossyHandle> {
        let id = self.lock().add(path.as_ref())?;
        let fs = self.clone();
        Ok(LossyHandle { fs, id })
    }

    fn delete<P: AsRef<Path>>(&self, path: P) -> Result<()> {
        let mut disk = self.lock();
        if disk.operation() {
            fs::remove_file(path.as_ref())?;
            if let Some(id) = disk.names.remove(path.as_ref()) {
                disk.files[id].path = None;
            }
        }
        Ok(())
    }

    fn rename<P: AsRef<Path>>(&self, from: P, to: P) -> Result<()> {
        let mut disk = self.lock();
        if disk.operation() {
            fs::rename(from.as_ref(), to.as_ref())?;
            if let Some(id) = disk.names.remove(from.as_ref()) {
                disk.files[id].path = Some(to.as_ref().to_path_buf());
                disk.names.insert(to.as_ref().to_path_buf(), id);
            }
        }
        Ok(())
    }

    fn new_reader(&self, handle: Arc<LossyHandle>) -> Result<LossyCursor> {
        Ok(LossyCursor { handle, offset: 0 })
    }

    fn new_writer(&self, handle: Arc<LossyHandle>) -> Result<LossyCursor> {
        Ok(LossyCursor { handle, offset: 0 })
    }
}
