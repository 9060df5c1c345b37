//! The program and the libraries in this process: how their stacks are unwound, and what is at an
//! address.

use std::fs::File;

#[cfg(target_arch = "aarch64")]
use framehop::aarch64::{
    CacheAarch64 as Cache, UnwindRegsAarch64 as UnwindRegs, UnwinderAarch64 as Unwinding,
};
#[cfg(target_arch = "x86_64")]
use framehop::x86_64::{
    CacheX86_64 as Cache, UnwindRegsX86_64 as UnwindRegs, UnwinderX86_64 as Unwinding,
};
use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder};
use object::{
    Object, ObjectSection, ObjectSegment, ObjectSymbol, ReadCache, SegmentFlags, SymbolKind,
};
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

use super::sys::Sample;

/// Frames of one stack that are looked at.
const FRAMES: usize = 256;

/// An executable mapping of a file.
pub(super) struct Image {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) offset: u64,
    pub(super) file: String,
    /// In hexadecimal digits.
    pub(super) build_id: String,
    symbols: Vec<Symbol>,
    names: Vec<u8>,
}

/// Where a function is in memory, and its name in `names`.
struct Symbol {
    start: u64,
    end: u64,
    name: std::ops::Range<u32>,
}

impl Image {
    /// The name of the function at `address`, demangled.
    fn name(&self, address: u64) -> Option<String> {
        let after = self.symbols.partition_point(|symbol| symbol.start <= address);
        let symbol = self.symbols[..after].last()?;
        if address >= symbol.end {
            return None;
        }
        let name = self.names.get(symbol.name.start as usize..symbol.name.end as usize)?;
        Some(format!("{:#}", rustc_demangle::demangle(&String::from_utf8_lossy(name))))
    }

    pub(super) fn has_names(&self) -> bool {
        !self.symbols.is_empty()
    }
}

/// All of them.
pub(super) struct Images {
    all: Vec<Image>,
    unwinder: Unwinding<Vec<u8>>,
    cache: Cache,
}

impl Images {
    /// Reads the tables of what is mapped now. What cannot be read is left out: its frames end the
    /// stacks that they are in.
    pub(super) fn load() -> Result<Self, String> {
        let maps = Process::myself().and_then(|me| me.maps()).map_err(|error| error.to_string())?;
        let mut images = Self { all: Vec::new(), unwinder: Unwinding::new(), cache: Cache::new() };
        for map in maps.iter().filter(|map| map.perms.contains(MMPermissions::EXECUTE)) {
            let MMapPath::Path(path) = &map.pathname else { continue };
            let file = path.to_string_lossy();
            let file = file.strip_suffix(" (deleted)").unwrap_or(&file).to_owned();
            match load(map, &file) {
                Ok((image, module)) => {
                    images.all.push(image);
                    images.unwinder.add_module(module);
                }
                Err(error) => tracing::debug!(file, error, "a program's tables cannot be read"),
            }
        }
        Ok(images)
    }

    /// The stack of a sample, innermost address first. Return addresses are those of the calls.
    pub(super) fn unwind(&mut self, sample: &Sample) -> Vec<u64> {
        let registers = &sample.registers;
        #[cfg(target_arch = "x86_64")]
        let start = UnwindRegs::new(registers.pc, registers.sp, registers.fp);
        #[cfg(target_arch = "aarch64")]
        let start = UnwindRegs::new(registers.lr, registers.sp, registers.fp);
        let mut read = |address: u64| {
            let at = address.checked_sub(registers.sp).ok_or(())? / 8;
            sample.stack.get(at as usize).copied().ok_or(())
        };
        let mut stack = Vec::new();
        let mut frames = self.unwinder.iter_frames(registers.pc, start, &mut self.cache, &mut read);
        while stack.len() < FRAMES
            && let Ok(Some(frame)) = frames.next()
        {
            stack.push(match frame {
                FrameAddress::InstructionPointer(address) => address,
                FrameAddress::ReturnAddress(_) => frame.address_for_lookup(),
            });
        }
        stack
    }

    /// The image that `address` is in, by its place.
    pub(super) fn image_of(&self, address: u64) -> Option<usize> {
        self.all.iter().position(|image| (image.start..image.end).contains(&address))
    }

    pub(super) fn all(&self) -> &[Image] {
        &self.all
    }

    /// The function at `address`.
    pub(super) fn name(&self, address: u64) -> Option<String> {
        self.all.get(self.image_of(address)?)?.name(address)
    }
}

/// Names of functions at `addresses`. Blocking.
pub fn symbolize(addresses: &[u64]) -> Result<Vec<Option<String>>, String> {
    let images = Images::load()?;
    Ok(addresses.iter().map(|address| images.name(*address)).collect())
}

fn load(map: &MemoryMap, path: &str) -> Result<(Image, Module<Vec<u8>>), String> {
    let (start, end) = map.address;
    // As mapped, also when an upgrade has replaced the file.
    let file = File::open(format!("/proc/self/map_files/{start:x}-{end:x}"))
        .or_else(|_| File::open(path))
        .map_err(|error| error.to_string())?;
    let cache = ReadCache::new(file);
    let object = object::File::parse(&cache).map_err(|error| error.to_string())?;
    let bias = object
        .segments()
        .find_map(|segment| {
            let SegmentFlags::Elf { p_flags } = segment.flags() else { return None };
            let (offset, size) = segment.file_range();
            let first = offset & !(procfs::page_size() - 1);
            // The segment before may share the first page.
            let it =
                p_flags & object::elf::PF_X != 0 && (first..offset + size).contains(&map.offset);
            let at = segment.address().wrapping_sub(offset).wrapping_add(map.offset);
            it.then(|| start.wrapping_sub(at))
        })
        .ok_or("no segment is what is mapped")?;
    let section = |name: &str| object.section_by_name(name);
    let range = |name: &str| section(name).map(|s| s.address()..s.address() + s.size());
    let data = |name: &str| Some(section(name)?.data().ok()?.to_vec());
    let info = ExplicitModuleSectionInfo {
        base_svma: 0,
        text_svma: range(".text"),
        text: data(".text"),
        got_svma: range(".got"),
        eh_frame_svma: range(".eh_frame"),
        eh_frame: data(".eh_frame"),
        eh_frame_hdr_svma: range(".eh_frame_hdr"),
        eh_frame_hdr: data(".eh_frame_hdr"),
        ..Default::default()
    };
    let module = Module::new(path.to_owned(), start..end, bias, info);
    let (mut symbols, mut names) = (Vec::new(), Vec::new());
    let mut add = |symbol: object::Symbol<'_, '_, &ReadCache<File>>| {
        if symbol.kind() != SymbolKind::Text || symbol.size() == 0 {
            return;
        }
        let Ok(name) = symbol.name_bytes() else { return };
        let from = names.len() as u32;
        names.extend_from_slice(name);
        let at = symbol.address().wrapping_add(bias);
        symbols.push(Symbol { start: at, end: at + symbol.size(), name: from..names.len() as u32 });
    };
    if object.symbol_table().is_some() {
        object.symbols().for_each(&mut add);
    } else {
        object.dynamic_symbols().for_each(&mut add);
    }
    symbols.sort_by_key(|symbol| symbol.start);
    let build_id = object.build_id().ok().flatten().unwrap_or_default();
    let build_id = build_id.iter().map(|byte| format!("{byte:02x}")).collect();
    let image =
        Image { start, end, offset: map.offset, file: path.to_owned(), build_id, symbols, names };
    Ok((image, module))
}
