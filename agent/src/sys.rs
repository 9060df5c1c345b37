//! What the C library is asked that has no safe wrapper.

#![allow(unsafe_code, reason = "the allocator's settings and madvise(2) have no safe interface")]

/// Gives memory that was freed back to the kernel (malloc_trim(3)). A list of thousands of objects is
/// decoded page by page and leaves holes that the allocator would keep for the next one, which may
/// never come. Blocking: some milliseconds.
pub(crate) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer, and the allocator locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has the allocator keep one heap for all threads and give large pieces back at once (mallopt(3)).
/// By default each thread has a heap with holes of its own, and the size from which pieces are mapped
/// singly grows with the first large list. Two threads that do little wait for one heap no more than for
/// the network. To be called before there are threads.
pub(crate) fn keep_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only sets numbers of the allocator.
    unsafe {
        const LARGE: libc::c_int = 128 << 10;
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
    }
}

/// Takes the program's text and constants out of this process' page tables; what is used comes back
/// by a fault that reads nothing, as the page cache has it. The kernel maps 64 KiB around whatever
/// is touched, so that after a start most of the program would count as this node's memory for
/// good. Costs some hundred soft faults, once.
pub(crate) fn unmap_unused_text() {
    // SAFETY: the callback is given valid headers, and returns after the first object, which is the
    // program itself.
    unsafe {
        libc::dl_iterate_phdr(Some(unmap_read_only), std::ptr::null_mut());
    }
}

/// Whether a segment of the program can be read again from its file, and so be dropped: one that
/// was ever writable has relocated pointers.
fn is_of_file_alone(kind: u32, flags: u32) -> bool {
    kind == libc::PT_LOAD && flags & libc::PF_W == 0
}

unsafe extern "C" fn unmap_read_only(
    program: *mut libc::dl_phdr_info,
    _: usize,
    _: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the C library passes a valid record, with as many headers as it says.
    let (base, headers) = unsafe {
        let program = &*program;
        let count = usize::from(program.dlpi_phnum);
        (program.dlpi_addr, std::slice::from_raw_parts(program.dlpi_phdr, count))
    };
    // SAFETY: sysconf(3) takes a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
    for header in headers.iter().filter(|h| is_of_file_alone(h.p_type, h.p_flags)) {
        let start = (base + header.p_vaddr) as usize & !(page - 1);
        let end = ((base + header.p_vaddr + header.p_memsz) as usize).next_multiple_of(page);
        // SAFETY: a private mapping of a file that nobody has written to: what is dropped is read
        // again, also by threads that are running in it.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of this program's own text that are mapped, in kB.
    fn mapped_text() -> u64 {
        let exe = std::env::current_exe().unwrap_or_default().display().to_string();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut own = false;
        let mut sum = 0;
        for line in maps.lines() {
            if let Some(rss) = line.strip_prefix("Rss:").filter(|_| own) {
                sum += rss.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            } else if line.contains('-') && !line.contains("kB") {
                own = line.ends_with(&exe) && line.contains(" r-xp ");
            }
        }
        sum
    }

    #[test]
    fn text_that_is_not_used_leaves_and_what_is_used_comes_back() {
        let (written, read) = (libc::PF_R | libc::PF_W, libc::PF_R | libc::PF_X);
        assert!(!is_of_file_alone(libc::PT_LOAD, written));
        assert!(!is_of_file_alone(libc::PT_GNU_RELRO, libc::PF_R));
        assert!(is_of_file_alone(libc::PT_LOAD, read));
        // Much of the program is touched before.
        let _ = format!("{:?}", a_filter());
        let before = mapped_text();
        unmap_unused_text();
        let after = mapped_text();
        assert!(before > 0 && after < before, "{before} kB before, {after} kB after");
        // And it still runs.
        assert!(format!("{:?}", a_filter()).contains("agent"));
    }

    fn a_filter() -> tracing_subscriber::EnvFilter {
        tracing_subscriber::EnvFilter::new("agent=debug,proxy[span{field=\"x.*\"}]=trace")
    }
}
