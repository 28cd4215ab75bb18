/* apm_vma.c - what does the kernel say is mapped here?
 *
 * Asked by the PROCMAP_QUERY ioctl where the kernel has it (6.11 and later: one look-up, however many mappings),
 * and by reading /proc/self/maps everywhere else (law 16). */
#include "apm_internal.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* The interface of linux/fs.h since 6.11, stated here because older headers lack it. */
struct procmap_query_v1 {
    uint64_t size, query_flags, query_addr;
    uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY_V1 _IOWR('f', 17, struct procmap_query_v1)
enum { VMA_READABLE = 1, VMA_WRITABLE = 2, VMA_SHARED = 8 };
_Static_assert(sizeof(struct procmap_query_v1) == 104, "the kernel's struct procmap_query");

static int open_table(const char *path) {
    int fd;
    APM_OUTSIDE(fd, APM_CALL_OPEN, 0, 0, 0, open(path, O_RDONLY | O_CLOEXEC));
    return fd < 0 ? -errno : fd;
}

static int by_query(uint64_t address, struct apm_vma *out) {
    int fd = open_table("/proc/self/maps");
    if (fd < 0)
        return fd;
    char name[4096];
    struct procmap_query_v1 query = {.size = sizeof query, .query_addr = address,
                                     .vma_name_addr = (uintptr_t)name, .vma_name_size = sizeof name};
    int result;
    APM_OUTSIDE(result, APM_CALL_QUERY, fd, address, 0, ioctl(fd, PROCMAP_QUERY_V1, &query));
    int error = result < 0 ? errno : 0;
    close(fd);
    if (error)
        return error == ENOENT ? APM_E_NOT_MAPPED : -error;
    *out = (struct apm_vma){.start = query.vma_start, .end = query.vma_end, .offset = query.vma_offset,
                            .device = makedev(query.dev_major, query.dev_minor), .inode = query.inode,
                            .readable = query.vma_flags & VMA_READABLE, .writable = query.vma_flags & VMA_WRITABLE,
                            .shared = query.vma_flags & VMA_SHARED};
    if (query.vma_name_size && strlen(name) < sizeof out->name) /* a name too long is left out, never cut */
        strcpy(out->name, name);
    return 0;
}

/* One line of /proc/self/maps: "start-end perms offset major:minor inode   name". */
static bool parse_line(char *line, struct apm_vma *out) {
    unsigned major_number, minor_number;
    char permissions[5];
    int name_at = 0;
    *out = (struct apm_vma){0};
    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &out->start, &out->end,
               permissions, &out->offset, &major_number, &minor_number, &out->inode, &name_at) < 7)
        return false;
    out->device = makedev(major_number, minor_number);
    out->readable = permissions[0] == 'r';
    out->writable = permissions[1] == 'w';
    out->shared = permissions[3] == 's';
    if (name_at) {
        char *name = line + name_at;
        name[strcspn(name, "\n")] = 0;
        if (strlen(name) < sizeof out->name)
            strcpy(out->name, name);
    }
    return true;
}

static FILE *open_stream(const char *path, int *error) {
    int fd = open_table(path);
    FILE *stream = fd < 0 ? NULL : fdopen(fd, "re");
    if (!stream) {
        *error = fd < 0 ? fd : -errno;
        if (fd >= 0)
            close(fd);
    }
    return stream;
}

static int by_reading(uint64_t address, struct apm_vma *out) {
    int error = 0;
    FILE *stream = open_stream("/proc/self/maps", &error);
    if (!stream)
        return error;
    char *line = NULL;
    size_t room = 0;
    int found = APM_E_NOT_MAPPED;
    while (found && getline(&line, &room, stream) > 0)
        if (parse_line(line, out) && address >= out->start && address < out->end)
            found = 0;
    free(line);
    fclose(stream);
    return found;
}

int apm_vma_at(uint64_t address, struct apm_vma *out) {
    int result = by_query(address, out);
    /* No such ioctl, or forbidden: the plain way. */
    return result == 0 || result == APM_E_NOT_MAPPED ? result : by_reading(address, out);
}

int apm_vma_is_synchronous(uint64_t address) {
    int error = 0;
    FILE *stream = open_stream("/proc/self/smaps", &error);
    if (!stream)
        return error;
    char *line = NULL;
    size_t room = 0;
    struct apm_vma vma;
    bool inside = false;
    int answer = 0;
    while (getline(&line, &room, stream) > 0) {
        if (strncmp(line, "VmFlags:", 8) == 0) {
            if (inside) {
                answer = strstr(line, " sf") != NULL; /* "synchronous fault" */
                break;
            }
        } else if (parse_line(line, &vma)) {
            inside = address >= vma.start && address < vma.end;
        }
    }
    free(line);
    fclose(stream);
    return answer;
}

int apm_vma_overlaps(const struct apm_file *file, uint64_t data, uint64_t size, uint64_t to, uint64_t *from,
                     bool *scattered) {
    uint64_t at = data, end = data + size;
    int answer = 0;
    *scattered = false;
    while (at < end) {
        struct apm_vma vma;
        int result = apm_vma_at(at, &vma);
        if (result < 0)
            return result == APM_E_NOT_MAPPED ? -EFAULT : result;
        uint64_t stop = end < vma.end ? end : vma.end, source = vma.offset + (at - vma.start);
        if (vma.inode == file->vma_inode && vma.device == file->vma_device && source < to + size &&
            to < source + (stop - at)) {
            *from = source;
            answer = 1;
        }
        *scattered = *scattered || stop < end;
        at = stop;
    }
    return answer;
}
